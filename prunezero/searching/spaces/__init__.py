"""Search spaces: which formulas and recipe choices a search may write; one YAML file each."""
