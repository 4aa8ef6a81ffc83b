"""Tests of the fused ops: every backend against formulas that share no code with the library."""
