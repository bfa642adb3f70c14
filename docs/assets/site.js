// Wide tables can be scrolled by keyboard, and the buttons of two blocks of code have names of their own.
new MutationObserver(() => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) table.tabIndex = 0;
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((nav) => {
    nav.ariaLabel = `Code ${document.querySelectorAll(".md-code__nav[aria-label]").length + 1}`;
  });
}).observe(document.documentElement, { childList: true, subtree: true });
