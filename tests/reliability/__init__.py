"""The tests behind docs/reliability.md in full: `python -m tests.reliability`."""
