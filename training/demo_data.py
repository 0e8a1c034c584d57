"""The offline demo set: questions about Python names, answered by the docstrings of installed packages.

Made on the user's machine when it is needed (a second or two); none of the text is shipped with us.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

MODULES = (
    "argparse ast asyncio base64 bisect calendar codecs collections concurrent.futures configparser "
    "contextlib copy csv dataclasses datetime decimal difflib email.message enum fileinput fractions "
    "ftplib functools gettext glob gzip hashlib heapq hmac html http.client http.cookiejar inspect io "
    "ipaddress itertools json locale logging logging.handlers mailbox math multiprocessing operator os "
    "os.path pathlib pickle platform plistlib pprint queue random re sched secrets selectors shelve "
    "shlex shutil smtplib socket sqlite3 ssl statistics string struct subprocess tarfile tempfile "
    "textwrap threading time timeit tokenize tomllib traceback types typing unittest urllib.parse "
    "urllib.request uuid wave weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib "
    "numpy numpy.linalg numpy.random numpy.fft numpy.ma numpy.polynomial pandas torch torch.nn "
    "torch.nn.functional torch.optim torch.utils.data torch.distributions scipy.stats scipy.optimize "
    "scipy.signal scipy.linalg scipy.sparse scipy.special scipy.interpolate scipy.spatial "
    "scipy.ndimage scipy.fft sklearn.linear_model sklearn.ensemble sklearn.metrics "
    "sklearn.preprocessing sklearn.model_selection sklearn.cluster sklearn.decomposition "
    "sklearn.datasets sklearn.feature_extraction.text sklearn.neighbors sklearn.svm sklearn.tree"
).split()

MIN_CHARACTERS, MAX_CHARACTERS = 40, 600


def demo_records() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Records in the `messages` format, in a fixed order: about 7,000 question-answer pairs."""
    seen: set[str] = set()
    for module_name in MODULES:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecated names warn when they are looked at
            try:
                module = importlib.import_module(module_name)
            except ImportError:
                continue
            pairs = list(_documented(module, module_name))
        for name, answer in pairs:
            if answer in seen:
                continue
            seen.add(answer)
            question = f"What does `{name}` do in Python?"
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }


def _documented(module: ModuleType, prefix: str) -> Iterator[tuple[str, str]]:
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    for name in sorted(set(names)):
        try:
            thing = getattr(module, name, None)
        except ImportError:  # e.g. scikit-learn's experimental names
            continue
        if thing is None or inspect.ismodule(thing):
            continue
        yield from _answer(thing, f"{prefix}.{name}")
        if inspect.isclass(thing):
            for member in sorted(vars(thing)):
                if not member.startswith("_"):
                    yield from _answer(getattr(thing, member, None), f"{prefix}.{name}.{member}")


def _answer(thing: object, name: str) -> Iterator[tuple[str, str]]:
    if not callable(thing):
        return
    try:
        text = inspect.getdoc(thing) or ""
    except Exception:  # noqa: BLE001 - a foreign object's __doc__ may raise anything
        return
    text = _first_paragraphs(text)
    if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        yield name, text


def _first_paragraphs(doc: str) -> str:
    """Prose before the first section, list or example, without the signature line of C functions."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        heading = re.search(r"^\s*(-{3,}|={3,}|>>>|\.\. |:\w+|@|[*•] )", paragraph, re.MULTILINE)
        if heading or re.match(r"(Args|Parameters|Returns|Examples?|Notes?|See Also)\b", paragraph):
            break
        if not paragraphs and re.match(r"^[\w.]+\(.*\)( ->.*)?$", paragraph):
            continue
        paragraphs.append(" ".join(paragraph.split()))
        if len(paragraphs) == 2:
            break
    return "\n\n".join(paragraphs)


if __name__ == "__main__":  # `python -m training.demo_data > train.jsonl`
    for record in demo_records():
        print(json.dumps(record))
