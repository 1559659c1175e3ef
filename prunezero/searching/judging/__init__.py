"""What is a rule worth? The rungs of the ladder, what is known of them already, and their audit."""
