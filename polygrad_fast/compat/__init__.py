"""Use of the released PolyGRAD code's objects and weights."""
