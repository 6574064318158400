"""Generation: one compiled frame step, and the drivers that call it."""
