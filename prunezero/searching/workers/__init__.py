"""Workers: evaluators in other processes and on other machines."""
