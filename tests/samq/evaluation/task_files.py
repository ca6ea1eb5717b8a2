"""Task files as a user writes them."""

import json

COLOURS = [("snow", "white"), ("coal", "black"), ("grass", "green"), ("blood", "red")]


def write_task(folder, *, name="colours", items=COLOURS, prompt="{{thing}} is", more=""):
    """A multiple-choice task with its items beside it; returns the .yaml file."""
    data = folder / f"{name}.jsonl"
    choices = [colour for _, colour in COLOURS]
    rows = [{"thing": thing, "colour": colour, "colours": choices} for thing, colour in items]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        f'output_type: multiple_choice\ndoc_to_text: "{prompt}"\ndoc_to_choice: colours\n'
        f'doc_to_target: "{{{{colours.index(colour)}}}}"\n'
        f"metric_list:\n  - {{metric: acc, aggregation: mean, higher_is_better: true}}\n{more}"
    )
    return path
