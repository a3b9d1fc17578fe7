"""Options are said once, in Config: the command line, recipes and docs/options.md have the same."""

from dataclasses import fields

from conftest import ROOT, run_script

from mrnet.training.config import GROUPS, THE_ARTICLES, Config, list_options, read_recipe


def test_the_articles_recipe_states_the_defaults():
    assert read_recipe("article") == ("article", THE_ARTICLES)


def test_the_page_of_options_is_up_to_date():
    """Made by: python -c "from mrnet.training.config import *; print(list_options(), end='')" """
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == list_options()


def test_every_option_is_in_the_help():
    text = run_script("train.py", "--help").stdout
    for name in GROUPS:
        assert f"\n{name}:\n" in text
    for one in fields(Config):
        if one.metadata:
            assert f"--{one.name.replace('_', '-')}" in text, one.name
