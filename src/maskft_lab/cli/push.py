"""``maskft push``: an adapter, or a model that one was merged into, on the hub."""

from __future__ import annotations


def add_arguments(parser) -> None:
    """Options of ``maskft push``."""
    parser.add_argument("folder", metavar="DIR", help="adapter folder, or a folder that maskft merge has written")
    parser.add_argument("repository", metavar="NAME", help="where to, e.g. your-name/your-mask; made if not there")
    parser.add_argument("--base", metavar="NAME", help="the base's name on the hub; default: what the adapter says")
    parser.add_argument("--public", action="store_true", help="make a public repository; default: a private one")


def run(args) -> None:
    """Check, say what is uploaded, and upload it in one commit."""
    from maskft_base.runtime import silence

    from ..sharing.push import contents_of, push

    silence()
    contents = contents_of(args.folder, args.repository, args.base)
    print(f"uploading to {args.repository}: {', '.join(sorted(contents))}")
    print(push(contents, args.repository, is_private=not args.public))
