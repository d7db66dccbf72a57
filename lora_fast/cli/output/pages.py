"""Self-contained HTML pages from the templates beside the commands."""

from __future__ import annotations


def render(template: str, **content: object) -> str:
    """Returns the page of a template, named by its path under lora_fast/cli/. The page refers to no other file."""
    import jinja2

    loader = jinja2.PackageLoader("lora_fast.cli", package_path="")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(**content)
