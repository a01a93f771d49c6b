"""Torch: state as named tensors and a typed tree, its hashes, and resumable loaders."""
