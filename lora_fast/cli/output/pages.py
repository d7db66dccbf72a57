"""Renders the HTML pages of the commands from the templates beside their code."""

from __future__ import annotations


def render(template: str, **content: object) -> str:
    """Returns the page of a template, which is named by its path below lora_fast/cli/. Text is escaped unless the
    template marks it as safe. The templates load no other file, so that a page can be moved or sent alone."""
    import jinja2

    loader = jinja2.PackageLoader("lora_fast.cli", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**content)
