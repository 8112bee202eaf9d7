"""Write `plugins/op_spec.h` from the table of the op's inputs: `python plugins/op_spec.py`."""

from pathlib import Path

from converter.signature import header

if __name__ == "__main__":
    (Path(__file__).parent / "op_spec.h").write_text(header())
