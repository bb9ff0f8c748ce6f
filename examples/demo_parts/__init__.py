"""The parts of ``examples/demo.py``, one measurement a file."""
