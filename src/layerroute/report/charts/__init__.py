"""Small charts as inline SVG: no script, no font, no colour that is not a class of the page's style sheet."""
