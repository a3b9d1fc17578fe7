"""A sweep's results as one table (not yet)."""


def dropped_recipes(folder):
    return set()


def print_table(folder):
    pass
