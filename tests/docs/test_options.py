from tools import options


def test_options_are_those_of_the_settings():
    current = options.OUTPUT.read_text("utf-8")
    assert current == options.page(), "run `python -m tools.options`, and commit docs/options.md"


def test_options_of_a_command_show_inherited_and_nested_fields_and_own_defaults():
    page = options.page()
    segmenter = page[page.index("## cvmatch train-segmenter") : page.index("## cvmatch synth")]
    for line in (
        "| `--fit.schedule` | `plateau` | Learning rate: ",  # of the stage, where Fit has cosine
        "| `--val` | absent | ",
        "| `--val.root` | ",
        "| `--augment` | yes | ",
    ):
        assert line in segmenter
    build = page[page.index("## cvmatch build-index") : page.index("## cvmatch index info")]
    assert "| `--tiles.root` | " in build  # of the parent class
    assert "|  |  |" not in page
    assert "\n\n\n" not in page
