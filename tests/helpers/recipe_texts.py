"""A recipe that is valid, and how tests read one."""

from hf_soap.hub import recipes

VALID = """\
# A comment
optim: soap
optim_args: precondition_frequency=2,betas=(0.9,0.95),adam_modules=lm_head|(wte|wpe)
learning_rate: 3e-3
eval_strategy: no
bf16: false
use_cpu: true
train_files: [a.txt, books/*.txt]
config_overrides: n_layer=2,activation_function=gelu_new,resid_pdrop=0.1
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: '{"min_lr": 1e-4}'
provenance:
  dataset: a.txt
  results: {eval_loss: 3.25}
"""


def read(text: str) -> recipes.Recipe:
    return recipes.read(text.encode(), source="the file")
