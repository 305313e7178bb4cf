"""The programs of scripts/, run in the process of the tests: a Python of their own takes a second to import what they need."""

import importlib
import io
import logging
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch


def run_program(name: str, *words: object) -> subprocess.CompletedProcess:
    """Run a program as from its command line; return its exit status, what it printed, and its log."""
    command, printed, told = [f"scripts/{name}.py", *map(str, words)], io.StringIO(), io.StringIO()
    log, status = logging.StreamHandler(told), 0
    logging.getLogger().addHandler(log)
    try:
        with redirect_stdout(printed), redirect_stderr(told), patch.object(sys, "argv", command):
            importlib.import_module(name).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        told.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    except Exception:
        told.write(traceback.format_exc())
        status = 1
    finally:
        logging.getLogger().removeHandler(log)
    return subprocess.CompletedProcess(command, status, printed.getvalue(), told.getvalue())


def start_program(name: str, *words: object) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, as Snakemake does: with other hash seeds, for one."""
    return subprocess.run([sys.executable, f"scripts/{name}.py", *map(str, words)], capture_output=True, text=True)
