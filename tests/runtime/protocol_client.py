"""A client of docs/protocol.md that does not import Drivetrain.

    python protocol_client.py SOCKET JOB OP [JSON FIELDS]

Prints every frame that comes back as one JSON line, and ends with the answer to its request.
"""

import json
import os
import socket
import struct
import sys

import msgpack

VERSION = 1
LIMIT = 16 << 20


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.next_id = 0

    def send(self, op, **fields):
        self.next_id += 1
        body = msgpack.packb({"v": VERSION, "op": op, "id": self.next_id, **fields})
        self.socket.sendall(struct.pack(">I", len(body)) + body)
        return self.next_id

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError("the runtime closed the connection")
            data += part
        return data

    def receive(self):
        (length,) = struct.unpack(">I", self.exactly(4))
        assert length <= LIMIT
        frame = msgpack.unpackb(self.exactly(length))
        assert frame["v"] == VERSION
        return frame


def main():
    path, job, op = sys.argv[1:4]
    fields = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    client = Client(path)
    number = client.send(op, **({"job": job, "uid": os.getuid()} if op != "ping" else {}), **fields)
    while True:
        frame = client.receive()
        print(json.dumps(frame), flush=True)
        if frame.get("re") == number:
            break
    assert not any(name.startswith("drivetrain") for name in sys.modules)
    sys.exit(frame["op"] == "error")


if __name__ == "__main__":
    main()
