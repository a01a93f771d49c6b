"""torch's own suites against the custom device; see `tools/judge_torch.py`."""
