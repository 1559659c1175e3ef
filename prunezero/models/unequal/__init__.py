"""Models whose layers differ in size: their classes, in memory and in a saved folder."""
