"""Testing kits for authors of operators and strategies: do these keep their promises?"""
