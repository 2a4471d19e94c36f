"""Attention over packed sequences: `packed` says where they lie, `dispatch` picks the kernel."""
