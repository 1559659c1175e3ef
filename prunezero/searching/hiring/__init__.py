"""Who else may judge? Processes of this machine, and actors on a cluster."""
