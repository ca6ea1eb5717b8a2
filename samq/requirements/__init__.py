"""What a run takes of a machine before it starts: GPU memory, RAM, disk and time.

`outline` has a model's shapes without its weights, `memory` what each stage takes, `rates` what this machine does in a second,
and `seconds` how long each stage takes at these rates. Times are products, and no more than that.
"""
