"""The words of a recipe that removes experts, as constants of its page.

Export exchanges them for those of a recipe, and settles by them which branches a page needs.
"""

COMPARE = "group"  # which experts compete: those of one mixture, "group", or of the "model"
MEASURE = "units"  # what a sparsity is a share of: experts, "units", or "parameters"
GUARD = "none"  # whether experts with huge activations go last: "super"
PROTECT_FIRST = 0  # blocks at the beginning that lose nothing
PROTECT_LAST = 0  # and at the end
SEED = 0  # of chance
LETTERS: list[str] = ["g", "n", "r"]  # what is looked at of each sequence, see `tables_of`
