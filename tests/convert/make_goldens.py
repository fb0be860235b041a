"""Makes golden.json: what llama.cpp's converter writes for every case of checkpoints.py.

Needs llama.cpp's source (it comes in the llama-cpp-python source distribution under vendor/llama.cpp) and its
converter's requirements (torch, transformers); the tests themselves need neither. The one thing changed in the
converter is the name of the pre-tokenizer: it is looked up by a hash of token ids, which tiny vocabularies do not have.

    python tests/convert/make_goldens.py path/to/llama.cpp [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden.json")


def reference(case: Any, folder: Path, output: Path) -> None:
    """Run llama.cpp's converter in this process."""
    import gguf  # type: ignore[import-untyped, unused-ignore]
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    types = {"AUTO": gguf.LlamaFileType.GUESSED, "F32": gguf.LlamaFileType.ALL_F32,
             "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16}  # fmt: skip
    with torch.inference_mode():
        config = ModelBase.load_hparams(folder, False)
        model_class = get_model_class(get_model_architecture(config, ModelType.TEXT), mmproj=False)
        model_class.get_vocab_base_pre = lambda self, tokenizer: case.pre
        model_class(folder, types[case.type], output).write()


def main() -> None:
    """Write golden.json, and keep the files if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--keep", type=Path, help="keep checkpoints and reference files here")
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    import encoder_checkpoints  # these import gguf: only now, so that it is llama.cpp's own
    import learned_checkpoints
    from checkpoints import CASES, build
    from manifest import manifest

    goldens: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.keep or Path(scratch)
        for name, case in (CASES | learned_checkpoints.CASES | encoder_checkpoints.CASES).items():
            folder = build(case, base / name)
            output = base / name / "reference.gguf"
            reference(case, folder, output)
            goldens[name] = manifest(output)
            print(name, file=sys.stderr)
    GOLDEN.write_text(json.dumps(goldens, indent=0, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
