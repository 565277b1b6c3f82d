"""Give the language model of a checkpoint more layers, without a change of what it says.

    python examples/deepen_model.py MODEL OUT --layers 3

Copies of its last layers are put on top, in order, with zero for what they write into the states (block expansion,
"LLaMA Pro", https://huggingface.co/papers/2401.02415). So the new model answers as the old one did, and learns from
there. New layers on top read what the old ones have made of the frames: of a model whose visual tokens know more than
its answers tell, that is what is missing.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

from visa_hf import VisaForVideoSegmentation, VisaProcessor


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--layers", type=int, default=3, help="how many more; at most as many as there are")
    args = parser.parse_args()
    model = VisaForVideoSegmentation.from_pretrained(args.model)
    num_layers = model.config.text_config.num_hidden_layers
    if not 1 <= args.layers <= num_layers:
        parser.error(f"--layers is {args.layers}; give 1 to {num_layers}, as many as the model has to be copied.")
    deepen(model, args.layers).save_pretrained(args.out)
    VisaProcessor.from_pretrained(args.model).save_pretrained(args.out)
    sys.stdout.write(f"wrote {args.out}: {num_layers + args.layers} layers\n")


@torch.no_grad()
def deepen(model: VisaForVideoSegmentation, num_new: int) -> VisaForVideoSegmentation:
    """Return a model with `num_new` more layers in its language model and the same outputs."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    num_old = text.num_hidden_layers
    text.num_hidden_layers = num_old + num_new
    if getattr(text, "layer_types", None):
        text.layer_types = [*text.layer_types, *text.layer_types[-num_new:]]
    weights = dict(model.state_dict())
    prefix = "model.language_model.layers."
    for new in range(num_old, num_old + num_new):
        old = f"{prefix}{new - num_new}."
        for name in [name for name in weights if name.startswith(old)]:
            # What a layer adds to the states comes out of these two.
            is_written = "o_proj" in name or "down_proj" in name
            copied = torch.zeros_like(weights[name]) if is_written else weights[name].clone()
            weights[f"{prefix}{new}.{name.removeprefix(old)}"] = copied
    deeper = VisaForVideoSegmentation(config).to(model.dtype).eval()
    deeper.load_state_dict(weights)
    return deeper


if __name__ == "__main__":
    main()
