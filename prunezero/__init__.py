"""Search for the formula that prunes your language model best."""
