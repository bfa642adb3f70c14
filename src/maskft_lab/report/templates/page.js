"use strict";
const byId = (id) => document.getElementById(id);

// Light and dark: as the system says, until the button is used.
const theme = byId("theme");
const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const showTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-pressed", String(isDark())); };
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; showTheme(); });
showTheme();

// A table that is wider than the page says so below it.
const hints = () => document.querySelectorAll(".scroll").forEach((box) => {
  const isCut = box.scrollWidth > box.clientWidth + 1;
  const next = box.nextElementSibling;
  const hint = next && next.classList.contains("more") ? next : null;
  if (isCut && !hint) box.insertAdjacentHTML("afterend", '<p class="more">More columns: scroll to the right.</p>');
  if (!isCut && hint) hint.remove();
});
addEventListener("resize", hints);
document.addEventListener("toggle", hints, true);
hints();
