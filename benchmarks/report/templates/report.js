(() => {
  // One tooltip for every mark that carries data-tip. Text only: names in it can be anything.
  const tip = document.getElementById("tip");
  const show = (event) => {
    const mark = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 14 + box.width > innerWidth - 8;
    const below = event.clientY + 18 + box.height > innerHeight - 8;
    tip.style.left = (right ? Math.max(8, event.clientX - box.width - 14) : event.clientX + 14) + "px";
    tip.style.top = (below ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
  };
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
