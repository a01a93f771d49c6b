"""Two layers learn digits with drivetrain.hal alone: [--device ADDRESS] [--move-to ADDRESS]."""

import argparse

from sklearn.datasets import load_digits

from drivetrain import hal
from drivetrain.hal import ops


def weights(device, seed=0, hidden=48):
    """Random matrices, which are the same on every device, and biases of 0."""
    w1 = ops.random.normal((64, hidden), seed=seed, sequence=1, std=0.13, device=device)
    w2 = ops.random.normal((hidden, 10), seed=seed, sequence=2, std=0.13, device=device)
    return [w1, ops.zeros(hidden, device=device), w2, ops.zeros(10, device=device)]


def data(device):
    """Images as rows of 64 numbers, and what they show."""
    images, digits = load_digits(return_X_y=True)
    return [ops.asarray(x, device=device) for x in ((images / 16).astype("f4"), digits)]


def forward(w, images):
    """The hidden layer, and the logarithms of the ten probabilities."""
    hidden = ops.tanh(images @ w[0] + w[1])
    return hidden, ops.log_softmax(hidden @ w[2] + w[3])


def step(w, images, digits, rate=0.5):
    """Gradient descent in place; returns the mean cross entropy before it."""
    hidden, logs = forward(w, images)
    wanted = ops.astype(digits[:, None] == ops.arange(10, stream=images.stream), "float32")
    of_logits = (ops.exp(logs) - wanted) / images.shape[0]
    of_hidden = of_logits @ w[2].T * (1.0 - hidden * hidden)
    for at, (inputs, delta) in enumerate(((images, of_hidden), (hidden, of_logits))):
        w[2 * at] -= rate * (inputs.T @ delta)
        w[2 * at + 1] -= rate * ops.sum(delta, axis=0)
    return -ops.sum(wanted * logs) / images.shape[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="")
    parser.add_argument("--move-to", default="")
    given = parser.parse_args()
    device = hal.device(given.device)
    w, (images, digits) = weights(device), data(device)
    for at in range(200):
        if given.move_to and at == 100:
            device = hal.device(given.move_to)
            *w, images, digits = (x.to(device) for x in (*w, images, digits))
        loss = step(w, images[:1400], digits[:1400])
        if at % 50 == 0:
            print(f"step {at} on {device}: loss {float(loss):.3f}")
    told = ops.argmax(forward(w, images[1400:])[1], axis=1)
    right = ops.mean(ops.astype(told == digits[1400:], "float32"))
    print(f"accuracy on {told.size} digits not seen before: {float(right):.1%}")
