"""The suites: each module has STATES (the allocator states it runs in) and ``run(settings)``."""
