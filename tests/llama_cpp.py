"""What stock llama.cpp writes on, by the prebuilt binary of the npm package node-llama-cpp."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

# A folder in which `npm install --ignore-scripts node-llama-cpp` was run.
FOLDER = "PRUNEZERO_NODE_LLAMA_CPP"
ABSENT = f"node-llama-cpp was not found; name the folder of its node_modules by {FOLDER}"
_PROGRAM = """
import {pathToFileURL} from "url";
const [package_, file, text, count] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(package_ + "/dist/index.js"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const ids = text.startsWith("[") ? JSON.parse(text) : model.tokenize(text);
const context = await model.createContext({contextSize: 256, threads: 1});
const found = [];
for await (const token of context.getSequence().evaluate(ids, {temperature: 0})) {
  found.push(token);
  if (found.length >= Number(count)) break;
}
console.log(JSON.stringify([[...ids], found]));
process.exit(0);
"""


def package() -> Path | None:
    """Where node-llama-cpp is; None where it is not."""
    folder = Path(os.environ.get(FOLDER, ".")) / "node_modules" / "node-llama-cpp"
    return folder.resolve() if (folder / "dist" / "index.js").is_file() else None


def greedy(file: Path, text: str | list[int], count: int, scratch: Path) -> list[list[int]]:
    """Token ids of a text, and the likeliest ones that follow, up to the end of a text."""
    program = scratch / "greedy.mjs"
    program.write_text(_PROGRAM)
    said = text if isinstance(text, str) else json.dumps(text)
    words = ["node", str(program), str(package()), str(file), said, str(count)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
