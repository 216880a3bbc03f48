"""Retraining under a mask on ZeRO ranks."""
