"""From rows to pictures and pages: ``python -m mbkern bench report``."""
