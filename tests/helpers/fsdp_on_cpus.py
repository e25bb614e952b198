"""Runs `python -m hf_soap ...` with accelerate made to shard on CPUs, for tests without a GPU."""

import os
import runpy
import sys

from sharded_trainer import let_accelerate_shard_on_cpus

let_accelerate_shard_on_cpus()
try:
    runpy.run_module("hf_soap", run_name="__main__", alter_sys=True)
    code = 0
except SystemExit as end:
    code = int(end.code or 0)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # gloo's threads sometimes abort at a regular exit
