"""`espalier track`: experiments on what a shadow of the weights is worth."""
