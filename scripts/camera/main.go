// Command camera takes a picture of rollcall's page, once it is live and has
// drawn what it knows: camera URL FILE [WIDTH HEIGHT]. It needs Debian's
// chromium; scripts/screenshot builds and runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/chromedp/chromedp"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "camera:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	size := []int64{1180, 1420}
	if len(args) != 2 && len(args) != 4 {
		return fmt.Errorf("want URL FILE [WIDTH HEIGHT], not %q", args)
	}
	for i, text := range args[2:] {
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return err
		}
		size[i] = n
	}
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath("chromium"), chromedp.DisableGPU)
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox) // Chromium has none for root
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ctx, free := chromedp.NewExecAllocator(ctx, opts...)
	defer free()
	ctx, closeTab := chromedp.NewContext(ctx)
	defer closeTab()
	err := chromedp.Do(ctx,
		chromedp.EmulateViewport(size[0], size[1]),
		chromedp.Navigate(args[0]),
		chromedp.Poll[chromedp.Void](`document.getElementById("link-text").textContent === "live" && document.querySelector("#chart .layer") && document.querySelector("#events li")`),
		chromedp.Sleep(time.Second), // what is fresh is drawn as such no more
	)
	if err != nil {
		return fmt.Errorf("open %s: %w", args[0], err)
	}
	picture, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		return fmt.Errorf("picture of %s: %w", args[0], err)
	}
	return os.WriteFile(args[1], picture, 0o644)
}
