"""How much DeepSpeed sets aside, as the engine tells it and the estimate of a rank's memory counts it."""

MOST_BUCKET = 50_000_000  # elements reduced or gathered at once
MOST_GATHERED = 1_000_000_000  # elements of parameters that stage 3 keeps whole at once
