// Contrast of text by WCAG 2.1 (4.5 to 1, 3 to 1 where it is large); one level-one heading, and no level left out below
// it; names of fields, buttons and pictures, no name where ARIA has none read; every place that is reached by Tab shows
// that it is; what is scrolled is reached by it too; heads of columns, one main part, a title, and the language.
const wrong = [], seen = e => { const b = e.getBoundingClientRect(), s = getComputedStyle(e);
  return b.width > 1 && b.height > 1 && s.visibility === 'visible' && +s.opacity > 0.1 && !e.closest('[hidden], [inert]'); };
const rgba = text => { const n = (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const ground = e => { const layers = []; for (let at = e; at; at = at.parentElement) {
    const c = rgba(getComputedStyle(at).backgroundColor); if (c[3] > 0) layers.push(c); if (c[3] === 1) break; }
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]); };
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) { const text = walker.currentNode.data.trim(), e = walker.currentNode.parentElement;
  if (!text || !seen(e) || e.closest('svg, script, style, canvas, [disabled], [aria-disabled=true]')) continue;
  const s = getComputedStyle(e), back = ground(e), a = light(over(rgba(s.color), back)), b = light(back);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(s.fontSize);
  if (ratio < (size >= 24 || (size >= 18.66 && +s.fontWeight >= 700) ? 3 : 4.5)) wrong.push(`contrast ${ratio.toFixed(2)}: ${text.slice(0, 40)}`); }
const heads = [...document.querySelectorAll('h1')].filter(seen);
if (heads.length !== 1) wrong.push(`${heads.length} level-one headings`);
const named = e => (e.getAttribute('aria-label') || e.title || e.innerText || (e.labels && e.labels.length) || e.closest('label') || e.getAttribute('aria-labelledby') || e.placeholder);
const levels = [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter(seen);
levels.slice(1).forEach((e, at) => { const [above, level] = [levels[at], e].map(h => +h.tagName[1]);
  if (level > above + 1) wrong.push(`h${level} after h${above}: ${e.innerText.slice(0, 40)}`); });
for (const e of document.querySelectorAll(':is(div, span, p, pre):is([aria-label], [aria-labelledby]):not([role])'))
  if (seen(e)) wrong.push(`a name that is not read, for want of a role: ${e.outerHTML.slice(0, 80)}`);
for (const e of document.querySelectorAll('body *')) { const s = getComputedStyle(e), scrolls = /auto|scroll/;
  const moved = scrolls.test(s.overflowX) && e.scrollWidth > e.clientWidth + 14 || scrolls.test(s.overflowY) && e.scrollHeight > e.clientHeight + 14;
  if (moved && seen(e) && e.tabIndex < 0 && !e.matches('input, textarea') && !e.querySelector('a[href], button, input, select, textarea, [tabindex="0"]'))
    wrong.push(`moved by a mouse alone: ${e.outerHTML.slice(0, 80)}`); }
for (const e of document.querySelectorAll('th')) if (seen(e) && !e.textContent.trim() && !e.getAttribute('aria-label')) wrong.push(`nothing heads a column: ${e.parentElement.innerText.slice(0, 40)}`);
if (document.querySelectorAll('main, [role=main]').length !== 1) wrong.push('not one main part');
if (!document.title) wrong.push('no title');
if (!document.documentElement.lang) wrong.push('no language');
for (const e of document.querySelectorAll('button, a[href], input, select, textarea')) if (seen(e) && !named(e)) wrong.push(`no name: ${e.outerHTML.slice(0, 100)}`);
for (const e of document.querySelectorAll('img')) if (seen(e) && !e.alt) wrong.push(`no words for ${e.src.slice(-40)}`);
for (const e of document.querySelectorAll('svg[role=img]')) if (seen(e) && !e.getAttribute('aria-label')) wrong.push('no words for a drawing');
for (const e of document.querySelectorAll('button, a[href], [tabindex="0"]')) { if (!seen(e) || e.disabled) continue; e.focus({focusVisible: true});
  const s = getComputedStyle(e); if (document.activeElement === e && s.outlineStyle === 'none' && s.boxShadow === 'none') wrong.push(`focus unseen: ${e.outerHTML.slice(0, 80)}`); }
return [...new Set(wrong)];
