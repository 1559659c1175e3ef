"""Who proposes the next rules, and out of what? Evolution, and controls to compare it with."""
