"""The commands of ``hf-soap``, one thin file each."""
