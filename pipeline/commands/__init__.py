"""Commands that change no model: plan, eval, compare, doctor, submit."""
