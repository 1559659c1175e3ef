"""The words of a recipe that removes units, as constants of its page.

Export exchanges them for those of a recipe, and settles by them which branches a page needs.
"""

UNIT = "width"  # what goes: "neuron", "kv_group", either of them ("width"), or query heads, "head"
COMPARE = "group"  # which units compete: those of one "group", or of the "model", each at its cost
MEASURE = "parameters"  # what a sparsity is a share of, or: units, weights, flops, kv bytes
MEMBERS = "consumer"  # matrices that score a unit: what reads it, its "producers", or "all"
COMBINE = "sum"  # how scores by several matrices become one
CHANNELS = "whole"  # how scores of single channels of a unit become one; "whole" takes it as one
NORMALISE = "none"  # what makes scores of several groups comparable
UPDATE: list[str] = []  # how columns that stay are mended: "refit", "bias"
REFIT_DAMPING = 0.01  # share of the mean Gram diagonal that is added to it for a refit
LEAST = 1  # units of a group that stay in any case
MULTIPLE_OF = 1  # channels that stay of a group are a multiple of this
PROTECT_FIRST = 0  # blocks at the beginning that lose nothing
PROTECT_LAST = 0  # and at the end
SEED = 0  # of chance
TARGETS: list[str] = []  # layers to prune, all if empty: names, their last parts, or "re:REGEX"
IGNORE: list[str] = []  # and those to leave alone
SEEN: list[str] = ["input_square_sum"]  # what is added up of what readers of units see
LEARNED: list[str] = []  # and of gradients of single weights
LOOKS_AT_UNITS = True  # whether the formula looks at more than single weights
DAMPING = 0.01  # share of the mean Gram diagonal that is added before an inversion, at least
