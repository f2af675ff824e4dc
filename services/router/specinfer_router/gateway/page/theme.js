// Sets the colours before the first paint, so that the page never flashes. A classic script on
// purpose; the button that changes the theme lives in chrome.js.
try {
  const theme = JSON.parse(localStorage.getItem("specinfer.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the system's theme stands.
}
