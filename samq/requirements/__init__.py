"""What a run takes of a machine before it starts: GPU memory, RAM, disk and time.

`outline` has a model's shapes without its weights. `memory` has what each stage takes, and `rates` what this machine does in a
second. `seconds` has how long each stage takes at these rates. Times are products, and no more than that.
"""
