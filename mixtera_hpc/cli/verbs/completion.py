"""`mixtera-hpc completion`: let the shell complete verbs, options, keys, values and runs."""

import os
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from mixtera_hpc.errors import ConfigError

__all__ = ["SCRIPTS", "arguments", "run"]

SCRIPTS: Mapping[str, str] = {
    # bash splits words at `=` as well, and replaces only what follows it.
    "bash": """\
_mixtera_hpc() {
  local line=${COMP_LINE:0:COMP_POINT} word before="" IFS=$'\\n'
  word=${line##*[[:space:]]}
  case $COMP_WORDBREAKS in *=*) [[ $word == *=* ]] && before=${word%"${word##*=}"} ;; esac
  # shellcheck disable=SC2207
  COMPREPLY=($(mixtera-hpc completion --line="$line" 2>/dev/null))
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o bashdefault -o default -F _mixtera_hpc mixtera-hpc
""",
    "zsh": """\
_mixtera_hpc() {
  local -a found
  found=("${(@f)$(mixtera-hpc completion --line="${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
  found=(${found:#})
  if (( $#found )); then
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
  else
    _files
  fi
}
compdef _mixtera_hpc mixtera-hpc
""",
    "fish": """\
complete -c mixtera-hpc -a '(mixtera-hpc completion --line=(commandline -cp) 2>/dev/null)'
""",
}
"""Name of a shell → the code that enables completion in it."""


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("shell", nargs="?", choices=sorted(SCRIPTS), help="the shell (default: that of $SHELL)")
    parser.add_argument(
        "--install", action="store_true", help="write the code where new shells find it, instead of printing it"
    )
    parser.add_argument("--line", help=SUPPRESS)
    parser.epilog = """\
Examples:
  mixtera-hpc completion --install
  eval "$(mixtera-hpc completion bash)"        # for this shell only
  mixtera-hpc submit experiment=d<Tab> job.n<Tab>
bash reads ~/.local/share/bash-completion/completions (package bash-completion), fish ~/.config/fish/completions; for
zsh, --install adds one line to ~/.zshrc."""


def run(args: Namespace) -> int:
    """Print or install the code of a shell, or print the words that complete a line."""
    if args.line is not None:
        # Imported here because the schema takes longer to import than `--help` may take.
        from mixtera_hpc.cli.answers.completion_answer import completions

        print("\n".join(completions(args.line)))
        return 0
    shell = args.shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SCRIPTS:
        raise ConfigError(
            f"$SHELL is {os.environ.get('SHELL', 'unset')!r}, but completion is for {', '.join(sorted(SCRIPTS))}.\n"
            "  Name the shell: mixtera-hpc completion bash"
        )
    if args.install:
        print(f"Written to {_install(shell)}. New shells complete mixtera-hpc.")
    else:
        print(SCRIPTS[shell], end="")
    return 0


def _install(shell: str) -> Path:
    """Write the code where new shells of this user find it, and return the file."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if shell == "zsh":
        return _add_line(home / ".zshrc", 'autoload -Uz compinit && compinit && eval "$(mixtera-hpc completion zsh)"')
    folder, name = {
        "bash": (data / "bash-completion/completions", "mixtera-hpc"),
        "fish": (settings / "fish/completions", "mixtera-hpc.fish"),
    }[shell]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SCRIPTS[shell])
    except OSError as error:
        raise _not_writable(folder / name, error) from None
    return folder / name


def _add_line(path: Path, line: str) -> Path:
    try:
        text = path.read_text() if path.exists() else ""
        if line not in text.splitlines():
            # Appended, so that a full disk cannot lose the settings of the user.
            with path.open("a") as file:
                file.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _not_writable(path, error) from None
    return path


def _not_writable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error}.\n  Print the code with mixtera-hpc completion SHELL, and add it yourself."
    )
