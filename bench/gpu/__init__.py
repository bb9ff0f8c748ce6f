"""The stages of ``bench/gpu_check.py``: what only a GPU can show."""
