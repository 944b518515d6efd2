"""Layers shared by the architecture families: norms, rotary positions, the gated MLP."""
