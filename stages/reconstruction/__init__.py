"""A unit's surviving weights fitted to what the dense unit gives."""
