"""The command `dp-lora-import`, without what is slow to load: the words it takes."""

from __future__ import annotations

from pathlib import Path

from dp_lora.commands.parser import Parser, ending
from dp_lora.errors import UserError
from dp_lora.models.layouts import LAYOUTS
from dp_lora.storage.files import expanded


def main() -> None:
    """Imports one checkpoint. A user's mistake is one line and exit status 2."""
    parser = Parser(
        prog="dp-lora-import",
        description="A CompVis latent-diffusion checkpoint, or a pipeline in one file, as a folder that "
        "model.pretrained takes.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .ckpt or .safetensors file")
    parser.add_argument("--layout", choices=LAYOUTS, help="which of CompVis's models it is")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PIPELINE",
        help="of Stable Diffusion, SDXL, SD 3 or FLUX in one file: a folder with the pipeline's settings",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--scale-factor", type=float, metavar="X", help="of the latents, if the file has none"
    )
    with ending("dp-lora-import", interrupted="nothing was written"):
        given = parser.parse_args()
        path, out = (
            expanded(given.checkpoint, str(given.checkpoint)),
            expanded(given.out, f"--out={given.out}"),
        )
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a CompVis checkpoint (.ckpt or .safetensors)")
        if out.exists():
            raise UserError(f"--out={out}: is there already; expected a new folder")
        if (given.layout is None) == (given.config is None):
            raise UserError("--layout and --config: expected one of the two")
        if given.config is not None:
            if given.scale_factor is not None:
                raise UserError(f"--scale-factor={given.scale_factor}: is for --layout; expected none")
            from dp_lora.models.single_file import import_single_file

            import_single_file(path, expanded(given.config, f"--config={given.config}"), out)
        else:
            from dp_lora.models.compvis import import_checkpoint

            import_checkpoint(path, given.layout, out, given.scale_factor)
    print(f"model  {out}\nuse    dp-lora model.pretrained={out} ...")


if __name__ == "__main__":
    main()
